"""A run as pages: every attempt, every correction and its reason, opened from a folder.

    dumps of a run, or rows of any framework → steps → questions → attempts   (`records`)
    → data files that a page loads one by one, pictures beside them           (`site`)

The pages need no server and ask nobody for anything; `serve` is for a run that goes on.
"""
