// Run a documented consumer with a `handle`, note what it does, and kill it where an event asks for that.
import fs from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import { pathToFileURL } from "node:url";

const { existsSync, renameSync } = fs;
let current = { data: {} };

function dieIfAsked(moment) {
  const mark = `died-${current.id}`;
  if (current.data.die !== moment || existsSync(mark)) return;
  fs.writeFileSync(mark, "");
  process.kill(process.pid, "SIGKILL");
}

globalThis.handle = (event) => {
  current = event;
  fs.appendFileSync("calls", `${event.id}\n`);
  dieIfAsked("before the commit");
  return JSON.stringify(event);
};

fs.existsSync = (path) => {
  fs.appendFileSync("offered", `${path.slice("done/".length)}\n`);
  return existsSync(path);
};

fs.renameSync = (old, name) => {
  renameSync(old, name);
  dieIfAsked("after the commit");
};

syncBuiltinESMExports();
await import(pathToFileURL(process.argv[2]));
