/* The theme, the zone and the times of a page. It runs before the page is drawn, so no page flashes in the other theme. */
"use strict";

window.viewer = (() => {
  // -- the theme: the browser's, until the visitor chooses the other one ------------------------------

  const KEPT = "theme";
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  function kept() {
    try {
      return { light: "light", dark: "dark" }[localStorage.getItem(KEPT)];
    } catch { // the browser keeps nothing for this site
      return undefined;
    }
  }

  function keep(theme) {
    try {
      if (theme) localStorage.setItem(KEPT, theme);
      else localStorage.removeItem(KEPT);
    } catch { /* The theme lasts until the page is left. */ }
  }

  function use(theme) {
    if (theme) root.dataset.bsTheme = theme;
    else delete root.dataset.bsTheme;
    showSwitch();
  }

  function showSwitch() {
    for (const each of document.querySelectorAll("[data-theme-switch]")) {
      each.hidden = false;
      each.setAttribute("aria-pressed", isDark());
    }
  }

  function isDark() {
    return root.dataset.bsTheme ? root.dataset.bsTheme === "dark" : prefersDark.matches;
  }

  function change() {
    const theme = isDark() ? "light" : "dark";
    const chosen = (theme === "dark") === prefersDark.matches ? undefined : theme;
    keep(chosen);
    use(chosen);
  }

  // -- times in the browser's zone ---------------------------------------------------------------------

  const wall = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
  const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });

  /* Writes times in the browser's zone, those of today without the date. The title keeps the server's text, in UTC. */
  function localise(root) {
    for (const time of root.querySelectorAll("time[datetime]:not([data-countdown])")) {
      const at = new Date(time.dateTime);
      const isToday = at.toDateString() === new Date().toDateString();
      time.textContent = (isToday ? clock : wall).format(at);
    }
    for (const mark of root.querySelectorAll("[data-time]")) {
      const second = mark.textContent.length > 5 ? "2-digit" : undefined;
      const shape = { hour: "2-digit", minute: "2-digit", second, hourCycle: "h23" };
      mark.textContent = new Date(mark.dataset.time).toLocaleTimeString(undefined, shape);
    }
    for (const mark of root.querySelectorAll("[data-day]")) {
      mark.textContent = new Date(mark.dataset.day).toLocaleDateString(undefined, { day: "numeric", month: "short" });
    }
    const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
    for (const each of root.querySelectorAll("[data-zone]")) each.textContent = zone;
    for (const each of root.querySelectorAll("[data-zone-field]")) each.value = zone;
  }

  if (kept()) use(kept());
  addEventListener("storage", (event) => event.key === KEPT && use(kept()));
  prefersDark.addEventListener("change", showSwitch);
  document.addEventListener("click", (event) => event.target.closest("[data-theme-switch]") && change());
  document.addEventListener("DOMContentLoaded", () => {
    showSwitch();
    localise(document);
  });
  return { clock, localise };
})();
