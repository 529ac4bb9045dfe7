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

// A list that is followed stands still while its rows are selected, or if the person says so.
const follow = document.getElementById("follow");
if (follow) {
  follow.parentElement.hidden = false;
  document.addEventListener("change", (event) => {
    if (event.target.name === "ids" && event.target.checked) follow.checked = false;
  });
  document.addEventListener("htmx:before:request", (event) => {
    if (!follow.checked) event.preventDefault();
  });
}
