"""Charts as SVG with fluid widths: places across are percentages, so that text keeps its size on a phone."""
