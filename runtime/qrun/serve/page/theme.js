// Before the page is drawn, so that it never flashes in the other colours.
"use strict";
{
  const read = () => { try { return localStorage.getItem("qrun.theme"); } catch { return null; } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const theme = read() ?? (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = theme === "dark" ? "Light" : "Dark";
  };
  show();
  system.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme")?.addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("qrun.theme", next); } catch { /* storage is off: the choice lasts as long as this page */ }
      show();
    });
  });
}
