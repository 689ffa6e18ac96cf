// The page works without this; with it, results change in place and pictures can be dropped.
const form = document.querySelector("form");
const file = document.getElementById("file");

async function show(address, options) {
  const results = document.getElementById("results");
  results.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(address, options);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    results.replaceWith(page.getElementById("results"));
    document.title = page.title;
  } catch {
    results.textContent = "The service does not answer; is it still running?";
    results.removeAttribute("aria-busy");
  }
}

function asked(text) {
  const values = new FormData(form);
  if (text === null) values.delete("q");
  return new URL(form.action).pathname + "?" + new URLSearchParams(values);
}

function search(address) {
  history.pushState(null, "", address);
  show(address);
}

function look(picture) {
  if (!picture) return;
  form.q.value = "";
  show(asked(null), { method: "POST", body: picture, headers: { "Content-Type": picture.type || "application/octet-stream" } });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  search(asked());
});
document.querySelectorAll(".examples a").forEach((link) =>
  link.addEventListener("click", (event) => {
    event.preventDefault();
    form.q.value = new URL(link.href).searchParams.get("q");
    search(asked());
  }),
);
addEventListener("popstate", () => {
  const values = new URLSearchParams(location.search);
  for (const field of form.querySelectorAll("input[name]")) field.value = values.get(field.name) ?? field.defaultValue;
  show(location.pathname + location.search);
});

if (file) {
  document.getElementById("drop").hidden = false;
  file.addEventListener("change", () => look(file.files[0]));
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    look(event.dataTransfer.files[0]);
  });
}
