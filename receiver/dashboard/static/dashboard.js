// If a page that reads itself again gets no answer, its figures are old: say so until an answer comes.
"use strict";
let last = new Date();
const say = (text) => {
  const stale = document.getElementById("stale");
  stale.textContent = `${text} This page is as of ${last.toISOString().slice(11, 19)} UTC.`;
  stale.hidden = false;
};
document.addEventListener("htmx:error", () => say("The receiver does not answer."));
document.addEventListener("htmx:after:request", (event) => {
  const { response, text } = event.detail.ctx;
  // An error page of a proxy, or a bug: to swap it in would remove the section, and nothing would read it again.
  if (response.status === 401 || text.includes('id="live"')) return;
  say("The receiver answers with an error.");
  event.preventDefault();
});
document.addEventListener("htmx:after:swap", () => {
  last = new Date();
  document.getElementById("stale").hidden = true;
});

// A list that is followed stands still while its rows are selected, or if the person says so.
const findFollow = () => document.getElementById("follow");
document.addEventListener("change", (event) => {
  const follow = findFollow();
  if (follow && event.target.name === "ids" && event.target.checked) follow.checked = false;
});
document.addEventListener("htmx:before:request", (event) => {
  if (findFollow()?.checked === false) event.preventDefault();
});
