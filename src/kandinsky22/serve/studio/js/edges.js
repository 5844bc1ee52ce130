// Edges of a picture, after J. Canny, "A Computational Approach to Edge Detection" (1986): smoothing, gradient,
// thinning across the edge, and hysteresis between two thresholds.

/**
 * Return a canvas with the edges: white lines on black.
 *
 * @param {CanvasImageSource} image
 * @param {{width: number, height: number, low: number, high: number, blur: number}} options Thresholds from 0 to 255;
 *   `blur` is the standard deviation of the smoothing in pixels.
 */
export function drawEdges(image, { width, height, low, high, blur }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const edges = detectEdges(pixels, low, high, blur);
  for (let index = 0; index < edges.length; index += 1) {
    pixels.data.fill(edges[index] ? 255 : 0, 4 * index, 4 * index + 3);
    pixels.data[4 * index + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Return 1 for each pixel on an edge and 0 elsewhere. The strongest of the three channels counts. */
export function detectEdges({ data, width, height }, low, high, blur) {
  const count = width * height;
  const across = new Float32Array(count);
  const down = new Float32Array(count);
  const strength = new Float32Array(count);
  for (let channel = 0; channel < 3; channel += 1) {
    const values = new Float32Array(count);
    for (let index = 0; index < count; index += 1) values[index] = data[4 * index + channel];
    accumulate(smooth(values, width, height, blur), width, height, across, down, strength);
  }
  return follow(thin(across, down, strength, width, height), width, height, low, high);
}

function smooth(values, width, height, sigma) {
  if (sigma < 0.1) return values;
  const radius = Math.ceil(2.5 * sigma);
  const kernel = Array.from({ length: 2 * radius + 1 }, (_, index) => Math.exp(-((index - radius) ** 2) / (2 * sigma * sigma)));
  const total = kernel.reduce((sum, weight) => sum + weight, 0);
  const pass = (source, length, stride, count, step) => {
    const target = new Float32Array(source.length);
    for (let line = 0; line < count; line += 1) {
      for (let at = 0; at < length; at += 1) {
        let sum = 0;
        for (let offset = -radius; offset <= radius; offset += 1) sum += kernel[offset + radius] * source[line * step + Math.min(Math.max(at + offset, 0), length - 1) * stride];
        target[line * step + at * stride] = sum / total;
      }
    }
    return target;
  };
  return pass(pass(values, width, 1, height, width), height, width, width, 1);
}

/** Keep the gradient (Sobel's operator, scaled to 0 to 255) where a channel's is the strongest so far. */
function accumulate(values, width, height, across, down, strength) {
  for (let y = 1; y < height - 1; y += 1) {
    for (let x = 1; x < width - 1; x += 1) {
      const at = y * width + x;
      const [a, b, c] = [values[at - width - 1], values[at - width], values[at - width + 1]];
      const [d, f] = [values[at - 1], values[at + 1]];
      const [g, i, k] = [values[at + width - 1], values[at + width], values[at + width + 1]];
      const horizontal = (c + 2 * f + k - a - 2 * d - g) / 4;
      const vertical = (g + 2 * i + k - a - 2 * b - c) / 4;
      const length = Math.hypot(horizontal, vertical);
      if (length > strength[at]) {
        strength[at] = length;
        across[at] = horizontal;
        down[at] = vertical;
      }
    }
  }
}

/** Keep only pixels that are the strongest across their edge. */
function thin(across, down, strength, width, height) {
  const thinned = new Float32Array(strength.length);
  for (let y = 1; y < height - 1; y += 1) {
    for (let x = 1; x < width - 1; x += 1) {
      const at = y * width + x;
      const angle = (Math.atan2(down[at], across[at]) * 4) / Math.PI;
      const sector = (Math.round(angle) + 8) % 4;
      const step = [1, width + 1, width, width - 1][sector];
      // Of two equally strong neighbours one stays.
      if (strength[at] > strength[at - step] && strength[at] >= strength[at + step]) thinned[at] = strength[at];
    }
  }
  return thinned;
}

/** Follow edges from pixels above the high threshold through pixels above the low one. */
function follow(strength, width, height, low, high) {
  const edges = new Uint8Array(strength.length);
  const open = [];
  for (let index = 0; index < strength.length; index += 1) {
    if (strength[index] >= high && strength[index] > 0) {
      edges[index] = 1;
      open.push(index);
    }
  }
  while (open.length) {
    const at = open.pop();
    for (const step of [-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1]) {
      const next = at + step;
      if (next < 0 || next >= edges.length || edges[next] || strength[next] < low || strength[next] === 0) continue;
      edges[next] = 1;
      open.push(next);
    }
  }
  return edges;
}
