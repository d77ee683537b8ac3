"""Where pages and cards come from: assets/*.html, *.md and *.css, filled in by jinja2."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEMPLATES = Environment(loader=FileSystemLoader(ASSETS), autoescape=select_autoescape(), trim_blocks=True)
