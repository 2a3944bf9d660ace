"""Commands that start from a recipe: their arguments, and the call that does the work."""
