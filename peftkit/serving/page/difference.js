// Which words of a text are not in another: what a longest common subsequence leaves over.

// Words, single characters of scripts that put no spaces between words, and signs.
const WORD = new RegExp(
  "[\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}]|[\\p{L}\\p{M}\\p{N}_]+|[^\\s]", "gu");
// Cells of the table, two bytes each: 5,000 by 5,000 words.
const MOST_CELLS = 25_000_000;

function wordsOf(text) {
  return Array.from(text.matchAll(WORD), (found) => ({ text: found[0], start: found.index, end: found.index + found[0].length }));
}

// For each word of `text`, whether it differs; null where the texts are too long to compare.
function differing(reference, text) {
  let [before, after] = [wordsOf(reference).map((word) => word.text), wordsOf(text).map((word) => word.text)];
  let head = 0;
  while (head < before.length && head < after.length && before[head] === after[head]) head += 1;
  let tail = 0;
  const room = Math.min(before.length, after.length) - head;
  while (tail < room && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail += 1;
  const same = new Array(after.length).fill(false);
  same.fill(true, 0, head).fill(true, after.length - tail);
  const [a, b] = [before.slice(head, before.length - tail), after.slice(head, after.length - tail)];
  if ((a.length + 1) * (b.length + 1) > MOST_CELLS) return null;
  for (const index of commonTo(a, b)) same[head + index] = true;
  return same.map((kept) => !kept);
}

// The places in `b` of a longest common subsequence.
function commonTo(a, b) {
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      longest[at] = a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const places = [];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    const at = i * width + j;
    if (a[i] === b[j]) {
      places.push(j);
      i += 1;
      j += 1;
    } else if (longest[at + width] >= longest[at + 1]) i += 1;
    else j += 1;
  }
  return places;
}

// The text as nodes, each run of differing words in a <mark>.
function marked(text, differs) {
  const nodes = [];
  const words = wordsOf(text);
  let from = 0;
  for (let index = 0; index < words.length; index += 1) {
    if (!differs[index]) continue;
    const { start } = words[index];
    while (index + 1 < words.length && differs[index + 1]) index += 1;
    const { end } = words[index];
    nodes.push(text.slice(from, start), element("mark", null, text.slice(start, end)));
    from = end;
  }
  return [...nodes, text.slice(from)];
}
