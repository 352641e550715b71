"""What tests of document sources share."""

import pytest

from shearling.data.documents import Document, Reading, parts, read
from shearling.errors import UserError


def documents_of(path, **settings) -> list[Document]:
    """The documents of all parts of a source, in order."""
    reading = Reading(**settings)
    return [document for part in parts(path, reading=reading) for document in read(part, reading=reading)]


def texts_of(path, **settings) -> list[str]:
    return [document.text for document in documents_of(path, **settings)]


def fault_of(function, *args, **kwargs) -> str:
    """The words of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)
