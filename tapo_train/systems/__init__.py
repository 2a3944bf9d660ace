"""Published systems around TAPO as parts that a recipe names by import path: a file each.

Nothing in the package imports them. What one of them needs that another run does not, its file
holds; what it can do with a seam of the package, it does with that.
"""
