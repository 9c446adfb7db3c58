"""DETR a second time, in plain tensor arithmetic: the specification that the fast modules are held to.

Read in this order: elementary, convolution, norms, positions, attention, scope, backbone, transformer, memory,
queries, heads, network; then boxes, matching, set_loss, average_precision. What differs from the paper's model where a
config says so: box_bias, refinement, classification. Lessons at any time. docs/reference.md walks through a picture.
"""
