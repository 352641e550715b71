"""What probing can't explain."""


class Refused(Exception):
    """No table can be proposed. The message is a sentence on what wasn't explained, with the missing term if known."""
