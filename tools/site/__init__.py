"""Makes the pages of the site that say what the code says: MkDocs calls `hooks`, tests call the rest."""
