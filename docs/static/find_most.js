/* A sentence as it was printed has the reader's own paths and numbers in it, which are on
   no page, and Chinese has no blanks between its words. Where Sphinx, which wants all words
   of a question, finds nothing, and for questions of five words or more, the pages are
   shown that have most of them. */
"use strict";

const HAN = /\p{Script=Han}/u;

/* The words of a question; Chinese as all pairs of neighbours. */
const partsOf = (terms) =>
  [...terms].flatMap((term) => {
    if (!HAN.test(term) || term.length < 3) return [term];
    return [...term].slice(1).map((c, i) => [...term][i] + c);
  });

/* The numbers of the pages that have a word, in their text or their title. */
const pagesWith = (word) => {
  const pages = new Set();
  for (const index of [Search._index.terms, Search._index.titleterms])
    for (const [term, found] of Object.entries(index))
      if (term === word || (HAN.test(word) && term.includes(word)))
        [found].flat().forEach((page) => pages.add(page));
  return pages;
};

const findMost = (terms) => {
  const { docnames, titles, filenames } = Search._index;
  const scores = new Map();
  for (const word of new Set(partsOf(terms))) {
    const pages = pagesWith(word);
    const weight = Math.log((1 + docnames.length) / Math.max(1, pages.size));
    pages.forEach((page) => scores.set(page, (scores.get(page) || 0) + weight));
  }
  const best = Math.max(0, ...scores.values());
  return [...scores]
    .filter(([, score]) => score > best / 2)
    .map(([page, score]) => [
      docnames[page], titles[page], "", null, score, filenames[page], "text",
    ]);
};

document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // a page that is not the search's
  const findAll = Search.performTermsSearch;
  Search.performTermsSearch = (terms, excluded) => {
    const found = findAll(terms, excluded);
    return found.length && terms.size < 5 ? found : findMost(terms);
  };
});
