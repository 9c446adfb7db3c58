"""DETR a second time, in plain tensor arithmetic: the specification that the fast modules are held to.

Read in this order: elementary, convolution, norms, positions, attention, scope, backbone, transformer, network;
then boxes, matching, set_loss, average_precision; lessons at any time. docs/reference.md walks through a picture.
"""
