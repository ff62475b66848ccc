// A wide table scrolls in a box of its own, which the theme makes after the page has come: a keyboard gets there, too.
new MutationObserver(() => {
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((box, index) => {
    if (!box.hasAttribute("tabindex")) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `Table ${index + 1}`);
    }
  });
}).observe(document.body, { childList: true, subtree: true });
