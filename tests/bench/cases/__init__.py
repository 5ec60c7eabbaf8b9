"""Models and checkpoints as people bring them, each of a kind, and what should become of them.

``checkpoints`` are what training tools leave behind, ``data`` what is given to judge a model by,
``models`` what is hard to export, ``undeclared`` what comes without a signature. `run` takes every
one of them through a release's own steps in processes of its own, and holds what comes out against
PyTorch: the weights against the module's own ``load_state_dict``, the file against the model.
"""
