"""A Llama-like decoder small enough for two CPU cores, with tensor and data parallelism of its own.

MindSpore on CPU cannot compile semi_auto_parallel ("Invalid backend: CPU"), so `parallel` cuts and
reduces by hand with MindSpore's CPU collectives, and `model` says with each parameter how it is cut.
That is what the trainer declares to the checkpoint hook where, on Ascend, MindSpore itself would save
the strategy while it compiles. Everything after that is the same on both.
"""
