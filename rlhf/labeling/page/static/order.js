// The arithmetic of a ranking with ties on a board of K rows, K the number of outputs: no markup, no state.
//
// `place` holds for each output its row, 1 (best) to K, or null while it has none. Outputs on one row are tied, and
// empty rows do not count: the page sends `ranks`, which leave no number out.

export const letter = (i) => String.fromCharCode(65 + i);

// Put output i onto a row, or off the board (null).
export function put(place, i, row) {
  return place.map((old, j) => (j === i ? row : old));
}

// Put output i onto a row of its own between rows `gap` and `gap` + 1 (0: above all). Where both are taken, the rows up to
// the nearest empty one move: there is one, for K outputs never fill K rows while one of them is lifted.
export function insert(place, i, gap) {
  const last = place.length;
  const others = put(place, i, null);
  const taken = (row) => others.includes(row);
  if (gap < last && !taken(gap + 1)) return put(others, i, gap + 1);
  if (gap > 0 && !taken(gap)) return put(others, i, gap);
  let empty = gap + 1;
  while (empty <= last && taken(empty)) empty += 1;
  if (empty <= last) {
    return put(others.map((row) => (row > gap && row < empty ? row + 1 : row)), i, gap + 1);
  }
  empty = gap;
  while (taken(empty)) empty -= 1;
  return put(others.map((row) => (row !== null && row > empty && row <= gap ? row - 1 : row)), i, gap);
}

// Move output i half a row up (-1) or down (1): an output by itself joins its neighbour, a tied one leaves its row. One that
// has no row goes below all others.
export function step(place, i, direction) {
  const row = place[i];
  if (row === null) return insert(place, i, Math.max(0, ...place));
  if (place.filter((other) => other === row).length > 1) {
    return insert(place, i, direction < 0 ? row - 1 : row);
  }
  const target = row + direction;
  return target < 1 || target > place.length ? place : put(place, i, target);
}

// Ranks 1, 2, .. without gaps; null for outputs without a row.
export function ranks(place) {
  const rows = [...new Set(place.filter((row) => row !== null))].sort((a, b) => a - b);
  return place.map((row) => (row === null ? null : rows.indexOf(row) + 1));
}

// "A › C = D › B".
export function words(place) {
  const groups = [];
  ranks(place).forEach((rank, i) => {
    if (rank !== null) (groups[rank - 1] ??= []).push(letter(i));
  });
  return groups.map((group) => group.join(" = ")).join(" › ");
}

// "Output B: rank 2 of 3, tied with C."
export function spoken(place, i) {
  const all = ranks(place);
  if (all[i] === null) return `Output ${letter(i)}: not ranked.`;
  const tied = all.flatMap((rank, j) => (rank === all[i] && j !== i ? [letter(j)] : []));
  const tail = tied.length ? `, tied with ${tied.join(" and ")}` : "";
  return `Output ${letter(i)}: rank ${all[i]} of ${Math.max(...all)}${tail}.`;
}
