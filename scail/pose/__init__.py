"""Pose: what the driving person does, as joints in space and key points in the picture, and its rendered video.

`PoseSequence` is the value that crosses the borders of this package; joints are camera millimetres, x right, y down,
z forward, and every picture is RGB.
"""
