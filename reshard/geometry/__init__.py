"""Axes, boxes, blocks, stored tensors; pieces that two sides share; whether all of them cover what they should. Integers only."""
