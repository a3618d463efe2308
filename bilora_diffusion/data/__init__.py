"""Pictures and captions: from a folder or a dataset to rows of a batch."""
