"""What a result looks like, beside the files that a plan makes: names of files, and the texts that go with them."""
