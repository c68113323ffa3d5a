// Searches `searchIndex`: [[file, page title, [[anchor, section title, text, printed], ...]], ...].
"use strict";

(function () {
  const LIMIT = 40;
  const query = new URLSearchParams(location.search).get("q") || "";
  const field = document.querySelector("article .bd-search input");
  field.value = query;

  // What people write in two ways, as a pattern that finds both.
  const SAME = {
    inplace: "in[- ]?place",
    oom: "(?:oom|out of memory)",
    wandb: "(?:wandb|weights & biases)",
    nan: "(?:nans?|not finite|nonfinite)(?![\\p{L}])",
    freeze: "(?:freez|froz)",
    amp: "(?:amp(?![\\p{L}])|mixed precision|autocast)",
    float16: "(?:float16|fp16|half)",
    bfloat16: "(?:bfloat16|bf16)",
    gpu: "(?:gpu|cuda)",
  };
  const REPEATS = /^(exercise|solution|sources|what to remember)/i;
  const COMMON = new Set(
    "a an and are as at be by can do does for from how i in is it my of on or that the this to was what when where which why with".split(" "),
  );
  const ENDINGS = "(?:ations?|ating|ated|ates?|ions?|ings?|ed|es|s|e)";
  const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

  function stem(word) {
    const short = word.replace(new RegExp(`${ENDINGS}$`), "");
    return short.length >= 4 ? short : word;
  }

  const plain = query
    .toLowerCase()
    .replace(/\bin[- ]place\b/g, "inplace")
    .replace(/\bout of memory\b/g, "oom")
    .replace(/\b(automatic )?mixed precision\b/g, "amp");
  const split = (text) => text.match(/[\p{L}\p{N}_]+/gu) || [];
  const telling = (words) => words.filter((word) => !COMMON.has(word.toLowerCase()));
  const typed = split(plain);
  const words = telling(typed).length > 0 ? telling(typed) : typed;
  // A word of the query matches at the start of a word, or after an underscore of a name.
  const begin = "(?<![\\p{L}\\p{N}])";
  const source = words.map((word) => begin + (SAME[word] || escape(stem(word))));
  const starts = source.map((pattern) => new RegExp(pattern, "giu"));
  // In a title the word itself tells more than one with another ending, and that more than a longer.
  const grades = words.map((word, i) => [
    [1, new RegExp(`${begin}${SAME[word] || escape(word)}s?(?!\\p{L})`, "iu")],
    [0.8, new RegExp(`${source[i]}${ENDINGS}?(?!\\p{L})`, "iu")],
    [0.6, new RegExp(source[i], "iu")],
    [0, /^/],
  ]);
  const phrase = new RegExp(
    typed.map((word) => SAME[word] || escape(stem(word))).join("[\\p{L}\\p{N}]*[^\\p{L}\\p{N}]+"),
    "iu",
  );
  const count = (text, pattern) => (text.match(pattern) || []).length;

  const places = searchIndex.flatMap(([file, pageTitle, sections]) =>
    sections.map(([anchor, title, text, printed], index) => ({
      // The first section is the page itself.
      link: index === 0 ? file : `${file}#${anchor}`,
      place: index === 0 ? "" : pageTitle,
      pageTitle,
      title,
      text,
      printed,
      // Exercises, sources, summaries and the table of contents repeat what a section has said;
      // a chapter explains what the reference lists.
      weight: REPEATS.test(title) || file.endsWith("/index.html") ? 0.5 : /\/api\//.test(file) ? 0.7 : 1,
    })),
  );
  const average = places.reduce((sum, place) => sum + place.text.length, 0) / places.length;
  // A word weighs more, the fewer places have it.
  const rarity = starts.map((pattern) => {
    const having = places.filter((p) => count(`${p.title} ${p.text} ${p.printed}`, pattern) > 0);
    return Math.log(1 + places.length / (1 + having.length));
  });

  function score(place) {
    let total = 0;
    let matched = 0;
    const length = 0.5 + place.text.length / (2 * average);
    // A title that says little else is about the query.
    const parts = place.title.replace(/_|(?<=\p{Ll})(?=\p{Lu}\p{Ll})/gu, " "); // of a name
    const named = telling(split(parts));
    const asked = named.filter((word) => starts.some((pattern) => count(word, pattern)));
    const share = asked.length / (named.length || 1);
    starts.forEach((pattern, i) => {
      const [title] = grades[i].find(([, form]) => form.test(place.title));
      const page = Math.min(count(place.pageTitle, pattern), 1);
      const body = count(place.text, pattern);
      const printed = count(place.printed, pattern);
      if (title + body + printed === 0) return;
      matched += 1;
      const often = (n) => n / (n + 1.5 * length);
      total += rarity[i] * ((2 + 2 * share) * title + page + 2 * often(body) + often(printed));
    });
    if (matched === 0) return 0;
    const all = rarity.reduce((sum, value) => sum + value, 0);
    if (words.length > 1) {
      if (phrase.test(place.title)) total += 2 * all;
      if (phrase.test(place.text) || phrase.test(place.printed)) total += all;
    }
    if (place.title.toLowerCase() === query.toLowerCase().trim()) total += 4 * all;
    return total * place.weight * (matched / words.length) ** 3;
  }

  function mark(element, text) {
    const pattern = new RegExp(`(?:${source.join("|")})[\\p{L}\\p{N}]*`, "giu");
    let last = 0;
    for (const match of text.matchAll(pattern)) {
      element.append(text.slice(last, match.index));
      element.append(Object.assign(document.createElement("mark"), { textContent: match[0] }));
      last = match.index + match[0].length;
    }
    element.append(text.slice(last));
    return element;
  }

  // The part of a text around the whole query, or else around the first word that it has.
  function excerpt(place) {
    for (const text of [place.text, place.printed]) {
      const together = text.search(phrase);
      const first = Math.min(...starts.map((p) => text.search(p)).filter((i) => i >= 0));
      const at = together >= 0 ? together : first;
      if (!Number.isFinite(at)) continue;
      const begin = at < 60 ? 0 : text.indexOf(" ", at - 60) + 1;
      const end = Math.min(text.length, begin + 220);
      return (begin > 0 ? "… " : "") + text.slice(begin, end) + (end < text.length ? " …" : "");
    }
    return place.text.slice(0, 180) + (place.text.length > 180 ? " …" : "");
  }

  const status = document.getElementById("search-status");
  if (words.length === 0) {
    status.textContent = "Type a word or a name, for example “retain_graph”.";
    field.focus();
    return;
  }
  const found = places
    .map((place) => ({ ...place, score: score(place) }))
    .filter((place) => place.score > 0)
    .sort((a, b) => b.score - a.score);

  const shown = found.slice(0, LIMIT);
  const more = found.length > shown.length ? `, the best ${shown.length} shown` : "";
  status.textContent =
    found.length === 0
      ? `Nothing found for “${query}”.`
      : `${found.length} ${found.length === 1 ? "place" : "places"} found for “${query}”${more}.`;
  document.title = `${query} · ${document.title}`;
  const list = document.createElement("ul");
  list.className = "search";
  for (const item of shown) {
    const entry = document.createElement("li");
    const link = mark(document.createElement("a"), item.title);
    link.href = item.link;
    entry.append(link);
    if (item.place) {
      const place = document.createElement("span");
      place.className = "search-place";
      place.textContent = item.place;
      entry.append(place);
    }
    if (item.text || item.printed) entry.append(mark(document.createElement("p"), excerpt(item)));
    list.append(entry);
  }
  document.getElementById("search-results").append(list);
})();
