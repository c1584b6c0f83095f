"""Decide when a network grows, how far and where, how fresh channels start, and how large images are."""

from elastic.growth.amount import Growth
from elastic.growth.gradmax import gradmax
from elastic.growth.resolution import Resolution
from elastic.growth.triggers import Periodic, Plateau, Trigger

__all__ = ["Growth", "Periodic", "Plateau", "Resolution", "Trigger", "gradmax"]
