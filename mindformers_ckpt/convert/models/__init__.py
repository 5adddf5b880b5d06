"""One file a model. Each defines MODEL; its tables are checked when it is loaded."""
