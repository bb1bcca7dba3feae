"""Other people's expert layers: how each is driven, one file a project."""
