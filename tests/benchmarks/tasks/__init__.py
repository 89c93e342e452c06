"""Small learning problems, most of at most 25 lines; `zoo.py` makes runs of them."""
