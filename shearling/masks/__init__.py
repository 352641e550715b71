"""Learned masks: gates, the constraint that brings them to a target shape, and how they lie on a model's weights."""
