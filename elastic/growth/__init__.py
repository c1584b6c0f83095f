"""Decide when a network grows, how far and where, and how fresh channels start."""

from elastic.growth.amount import Growth
from elastic.growth.gradmax import gradmax
from elastic.growth.triggers import Periodic, Plateau, Trigger

__all__ = ["Growth", "Periodic", "Plateau", "Trigger", "gradmax"]
