// Contrast ratios [WCAG 2.2] of every text that is shown, and of every mark, against what is behind it; the lowest first.
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return Array.from(context.getImageData(0, 0, 1, 1).data, (value) => value / 255);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
  const behind = (element) => {
    if (!element) return [1, 1, 1];
    const colour = pixel(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || element.closest("[hidden], script, defs")) continue;
    const style = getComputedStyle(element);
    const below = behind(element);
    const inSvg = element instanceof SVGElement;
    const text = Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.data.trim());
    const colour = inSvg ? style.fill : style.color;
    if (text) found.push(["text", ratio(over(pixel(colour), below), below), element.outerHTML.slice(0, 120)]);
    const isMark = element.matches("use.mean, line.mean, path.curve:not(.faint)");
    if (isMark) {
      const drawn = element.matches("use") ? style.fill : style.stroke;
      found.push(["mark", ratio(over(pixel(drawn), below), below), element.outerHTML.slice(0, 120)]);
    }
  }
  return found.sort((a, b) => a[1] - b[1]);
}
