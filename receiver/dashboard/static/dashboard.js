// If a page that reads itself again gets no answer, its figures are old: say so until an answer comes.
"use strict";
const stale = document.getElementById("stale");
let last = new Date();
document.addEventListener("htmx:error", () => {
  stale.textContent = `The receiver does not answer. This page is as of ${last.toISOString().slice(11, 19)} UTC.`;
  stale.hidden = false;
});
document.addEventListener("htmx:after:swap", () => {
  last = new Date();
  stale.hidden = true;
});
