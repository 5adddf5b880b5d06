"""Conversion of weights between Hugging Face and MindSpore, both ways.

A model is one file in `models`: tables of rules that hold in both directions. A conversion is a plan like
re-slicing: every target tensor is put together from boxes in views of source tensors, and can be cut for a
parallel strategy in the same pass. From one naming of MindSpore to another, the tables of both are composed.
"""
