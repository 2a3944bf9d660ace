"""Task files in, `Task` objects out; and the order in which training visits them."""
