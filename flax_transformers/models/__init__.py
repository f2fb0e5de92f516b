"""What is computed: pure Linen modules. Nothing here imports another room of this package.

Shape letters used in this folder:

    B batch   T query length   S key length   D model width   F feed-forward width
    N query heads   H head width   V vocabulary (padded)   M chosen positions   L layers
"""
