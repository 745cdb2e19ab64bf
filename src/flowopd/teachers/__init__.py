"""Velocity fields to learn from."""

from flowopd.teachers.base import BaseTeacher, FullTeacher, LoRATeacher, Teacher
from flowopd.teachers.router import Router
from flowopd.teachers.teaching import Role, Teaching

__all__ = ["BaseTeacher", "FullTeacher", "LoRATeacher", "Role", "Router", "Teacher", "Teaching"]
