"""SVG charts of variable width: horizontal positions are percentages, so text keeps its size on a phone."""
