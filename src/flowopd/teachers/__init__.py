"""Velocity fields to learn from."""

from flowopd.teachers.adapter import AdapterTeacher
from flowopd.teachers.base import BaseTeacher, FullTeacher, LoRATeacher, Teacher
from flowopd.teachers.composed import Beyond, Blend, Composed, Piecewise
from flowopd.teachers.router import Router
from flowopd.teachers.teaching import Role, Teaching

__all__ = [
    "AdapterTeacher",
    "BaseTeacher",
    "Beyond",
    "Blend",
    "Composed",
    "FullTeacher",
    "LoRATeacher",
    "Piecewise",
    "Role",
    "Router",
    "Teacher",
    "Teaching",
]
