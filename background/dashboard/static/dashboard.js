/* Refreshes a page of the dashboard, and counts down to its ticks. Every page works without it. */
"use strict";

(() => {
  const EVERY = 2000;
  const AT_MOST = 60000;
  const PATIENCE = 10000;

  let timer = null;
  let asking = null; // the current request
  let failures = 0;
  let freshAt = new Date();
  let ahead = 0; // milliseconds by which the server's clock is ahead

  // -- times -------------------------------------------------------------------------------------

  const { clock } = viewer;

  const exact = new Intl.DateTimeFormat(undefined, {
    hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3, hourCycle: "h23",
  });

  /* Writes the moments of a log and of a field in the browser's zone, and shows the buttons that copy. */
  function prepare(root) {
    for (const time of root.querySelectorAll("[data-exact]")) time.textContent = exact.format(new Date(time.dataset.exact));
    for (const field of root.querySelectorAll("[data-moment]")) {
      const at = new Date(field.dataset.moment);
      field.setAttribute("value", new Date(at - at.getTimezoneOffset() * 60000).toISOString().slice(0, 19));
    }
    if (!navigator.clipboard) return; // a browser offers none to a page without encryption
    for (const button of root.querySelectorAll("[data-copies]")) button.hidden = false;
  }

  function countDown(root) {
    for (const time of root.querySelectorAll("time[data-countdown]")) {
      const seconds = Math.round((new Date(time.dateTime) - Date.now() - ahead) / 1000);
      const text = seconds > 0 ? `in ${span(seconds)}` : "now";
      if (time.textContent !== text) time.textContent = text;
    }
  }

  /* Writes a length of time as the server does, in the two largest units. */
  function span(seconds) {
    const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    const largest = units.findIndex(([size]) => seconds >= size);
    return units.slice(largest, largest + 2)
      .map(([size, unit], index) => [Math.floor(seconds / size) % (index ? units[largest][0] / size : Infinity), unit])
      .filter(([count]) => count).map((each) => each.join(" ")).join(" ");
  }

  // -- refreshing --------------------------------------------------------------------------------

  function live() {
    return document.querySelector("[data-live]");
  }

  function later(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(refresh, milliseconds);
  }

  function halt() {
    clearTimeout(timer);
    timer = null;
    asking?.abort();
    asking = null;
  }

  async function refresh() {
    const request = asking = new AbortController();
    const giveUp = setTimeout(() => request.abort(), PATIENCE);
    try {
      const answer = await fetch(location.href, {
        cache: "no-store", redirect: "manual", signal: request.signal, headers: { Accept: "text/html" },
      });
      if (answer.type === "opaqueredirect" || answer.status === 401 || answer.status === 403) return sayEnded();
      const page = answer.ok && new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page && page.querySelector("[data-live]");
      if (!fresh) throw new Error(`the server answered ${answer.status}`);
      if (request === asking) show(fresh);
      failures = 0;
      freshAt = new Date();
      say("");
    } catch (error) {
      if (request !== asking) return; // aborted, because the page is hidden
      failures += 1;
      say(`Not refreshed since ${clock.format(freshAt)}: the server gives no valid answer. Trying again.`);
    } finally {
      clearTimeout(giveUp);
    }
    if (request === asking) later(Math.min(EVERY * 2 ** failures, AT_MOST));
  }

  function show(fresh) {
    read(fresh);
    viewer.localise(fresh);
    prepare(fresh);
    countDown(fresh);
    Idiomorph.morph(live(), fresh, {
      morphStyle: "outerHTML",
      callbacks: {
        beforeNodeMorphed: (old) => !isBeingFilledIn(old),
        beforeAttributeUpdated: (name, element) => !(name === "open" && element.localName === "details"),
      },
    });
  }

  function read(region) {
    if (region.dataset.clock) ahead = new Date(region.dataset.clock) - Date.now();
  }

  function isBeingFilledIn(element) {
    if (element.localName === "select") {
      return element === document.activeElement
        || [...element.options].some((option) => option.selected !== option.defaultSelected && option.value);
    }
    if (element.localName !== "textarea" && element.localName !== "input") return false;
    if (element.type === "hidden") return false;
    return element === document.activeElement || element.value !== element.defaultValue
      || element.checked !== element.defaultChecked;
  }

  // -- copying -----------------------------------------------------------------------------------

  /* Copies a whole text, also its folded parts. The moments of a log are copied in UTC. */
  async function copy(button) {
    const source = document.getElementById(button.dataset.copies).cloneNode(true);
    for (const time of source.querySelectorAll("[data-exact]")) time.textContent = time.dataset.exact;
    await navigator.clipboard.writeText([...source.querySelectorAll("pre")].map((each) => each.textContent).join("\n"));
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, EVERY);
  }

  // -- saying ------------------------------------------------------------------------------------

  /* Screen readers read each change aloud, so the text changes once per problem. */
  function say(text) {
    const status = document.querySelector("[data-status]");
    if (status.textContent !== text) status.textContent = text;
  }

  function sayEnded() {
    halt();
    document.removeEventListener("visibilitychange", startOrStop);
    say(`You are no longer logged in, so this page has not been refreshed since ${clock.format(freshAt)}. `);
    const again = document.createElement("a");
    again.href = location.href;
    again.textContent = "Log in again";
    document.querySelector("[data-status]").append(again);
  }

  // -- beginning and ending ----------------------------------------------------------------------

  function startOrStop() {
    halt();
    if (document.visibilityState === "visible") refresh();
  }

  /* A button loads the page again. Then the focus returns to it, or to the element that its data-then names. */
  function keepPlace(event) {
    halt();
    const id = event.submitter?.dataset.then || event.submitter?.id;
    if (id && event.target.method === "post") {
      sessionStorage.setItem("workers-place", JSON.stringify({ id, top: scrollY }));
    }
  }

  function findPlace() {
    const place = JSON.parse(sessionStorage.getItem("workers-place"));
    sessionStorage.removeItem("workers-place");
    if (!place || document.querySelector("[autofocus]")) return; // a refused form takes the focus
    const element = document.getElementById(place.id);
    element?.closest(".bw-fold")?.setAttribute("open", "");
    element?.focus({ preventScroll: true });
    scrollTo({ top: place.top, behavior: "instant" });
  }

  /* Let the button tick all boxes of its form's table, or none if all are ticked. */
  function offerAll(button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const boxes = [...button.form.querySelectorAll("td input[type=checkbox]")];
      const tick = !boxes.every((box) => box.checked);
      for (const box of boxes) box.checked = tick;
    });
  }

  /* Scroll a picture that is wider than the screen to its newest end. */
  for (const box of document.querySelectorAll(".bw-timeline")) box.scrollLeft = box.scrollWidth;
  prepare(document);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copies]");
    if (button) copy(button);
  });
  for (const button of document.querySelectorAll("[data-choose-all]")) offerAll(button);
  findPlace();
  if (live()) {
    read(live());
    countDown(document);
    setInterval(() => countDown(document), 1000);
    document.addEventListener("visibilitychange", startOrStop);
    document.addEventListener("submit", keepPlace);
    addEventListener("pagehide", halt);
    addEventListener("pageshow", (event) => event.persisted && startOrStop());
    if (document.visibilityState === "visible") later(EVERY);
  }
})();
