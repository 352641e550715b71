"""`make docs`: writes docs/families.md and README's list of models anew."""

import json
from pathlib import Path

from shearling.arch import described, families, towered
from shearling.conformance.page import families_page, readme_with

ROOT = Path(__file__).resolve().parents[1]
PROOFS, DRAFTS = ROOT / "benchmarks" / "conformance.json", ROOT / "benchmarks" / "draft.json"


def generated() -> dict[Path, str]:
    """What each file is to hold."""
    proofs, drafts = (json.loads(path.read_text()) if path.is_file() else {} for path in (PROOFS, DRAFTS))
    readme = ROOT / "README.md"
    return {
        ROOT / "docs" / "families.md": families_page([*families(), *towered().values()], proofs, drafts),
        readme: readme_with(readme.read_text(encoding="utf-8"), described(), proofs),
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
