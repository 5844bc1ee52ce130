// Weights of mixtures.

import { pictureReference } from "./api.js";

const round = (weight) => Math.round(weight * 1e4) / 1e4;

/**
 * Return weights that add up to 1. Weights whose sum is close to zero are scaled by their absolute sum instead, which
 * keeps the result in the range that the decoder knows.
 *
 * @param {number[]} weights
 */
export function normalised(weights) {
  const sum = weights.reduce((total, weight) => total + weight, 0);
  const absolute = weights.reduce((total, weight) => total + Math.abs(weight), 0);
  const scale = sum > 0.1 * absolute ? sum : absolute;
  return scale ? weights.map((weight) => round(weight / scale)) : weights;
}

/** Return the pairs of weights along the way from one card to another. */
export function linear(length) {
  return Array.from({ length }, (_, index) => [round(1 - index / (length - 1)), round(index / (length - 1))]);
}

/** Return the weights of four corners (upper left, upper right, lower left, lower right) in a grid, row by row. */
export function bilinear(side) {
  return Array.from({ length: side * side }, (_, index) => {
    const x = (index % side) / (side - 1);
    const y = Math.floor(index / side) / (side - 1);
    return [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y].map(round);
  });
}

/** Return the parts of a request: cards that hold something and have a weight. */
export function partsOf(cards, weights) {
  return cards.map((card, index) => ({ weight: weights[index], ...(card.picture ? pictureReference(card.picture) : { text: card.text?.trim() ?? "" }) }))
    .filter((part) => part.text !== "" && part.weight !== 0);
}
