"""Pages of what happened: a record read, drawn and laid out in one HTML file. No torch in here."""
