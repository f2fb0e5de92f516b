"""Models: pure Linen modules and their configs.

Shape letters used in this folder:

    B batch   T query length   S key length   D model width   F feed-forward width
    N query heads   H head width   V vocabulary (padded)   M selected positions   L layers
"""
