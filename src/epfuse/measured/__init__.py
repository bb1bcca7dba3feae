"""Tables of measured tiles: their form, their files, and how a call finds a row."""
