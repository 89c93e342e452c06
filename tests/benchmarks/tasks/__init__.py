"""Small learning problems, each in at most 25 lines; `zoo.py` makes runs of them."""
