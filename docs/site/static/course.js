// What is wider than its frame scrolls inside it, with the arrow keys too once it has the focus.
function focusable() {
  for (const frame of document.querySelectorAll("pre, .table-wrapper, .output")) {
    if (frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0;
    else frame.removeAttribute("tabindex");
  }
}

addEventListener("DOMContentLoaded", focusable);
addEventListener("resize", focusable);
addEventListener("toggle", focusable, true); // a folded cell that opens
