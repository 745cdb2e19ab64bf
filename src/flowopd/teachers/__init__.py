"""Velocity fields to learn from."""

from flowopd.teachers.base import BaseTeacher, FullTeacher, LoRATeacher, Teacher
from flowopd.teachers.router import Router

__all__ = ["BaseTeacher", "FullTeacher", "LoRATeacher", "Router", "Teacher"]
