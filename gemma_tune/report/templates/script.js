"use strict";
(() => {
  const root = document.documentElement;
  const all = (query, from = document) => Array.from(from.querySelectorAll(query));
  root.classList.remove("no-script");

  // Light, dark, or what the system says. A page that was opened from a disk may not be allowed to remember it.
  const themes = ["auto", "light", "dark"];
  const button = document.querySelector(".theme");
  const set = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    button.textContent = name;
    button.setAttribute("aria-label", "Colours: " + name);
    try { localStorage.setItem("gemma-tune-theme", name); } catch { /* not allowed */ }
  };
  let theme = "auto";
  try { theme = localStorage.getItem("gemma-tune-theme"); } catch { /* not allowed */ }
  set(themes.includes(theme) ? theme : "auto");
  button.addEventListener("click", () => set(themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % 3]));

  // The read-out of a chart: under the pointer, or by the arrow keys.
  for (const figure of all("figure[data-chart]")) {
    const series = JSON.parse(figure.dataset.chart).series;
    const read = figure.querySelector(".read");
    const still = read.innerHTML;
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    let place = -1;
    const clear = () => {
      place = -1;
      read.innerHTML = still;
      all(".cursor", figure).forEach((line) => line.remove());
    };
    const show = (step) => {
      read.textContent = "step " + step.toLocaleString("en") + ": ";
      series.forEach((one) => {
        let at = one.steps.findIndex((other) => other > step) - 1;
        if (at < -1) at = one.steps.length - 1;
        if (at < 0) return;
        const value = document.createElement("b");
        value.className = one.role;
        value.textContent = one.texts[at];
        read.append(one.named ? one.name + " " : "", value, " ");
      });
      for (const svg of all("svg", figure)) {
        const { left, right, first, last } = svg.dataset;
        const x = +left + ((step - first) / (last - first)) * (right - left);
        let line = svg.querySelector(".cursor");
        if (!line) {
          line = document.createElementNS("http://www.w3.org/2000/svg", "path");
          line.setAttribute("class", "cursor");
          svg.append(line);
        }
        line.setAttribute("d", `M${x} 12V${svg.viewBox.baseVal.height - 26}`);
      }
    };
    for (const svg of all("svg", figure)) {
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const { left, right, first, last } = svg.dataset;
        const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
        const wanted = +first + ((x - left) / (right - left)) * (last - first);
        const near = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
        place = steps.indexOf(near);
        show(near);
      });
      svg.addEventListener("pointerleave", clear);
    }
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length }[event.key];
      if (event.key === "Escape") clear();
      if (move === undefined) return;
      event.preventDefault();
      place = Math.min(steps.length - 1, Math.max(0, (place < 0 ? steps.length - 1 : place) + move));
      show(steps[place]);
    });
    figure.addEventListener("blur", clear);
  }

  // Answers that hold a word, or that did not end.
  const word = document.querySelector("#answers-word");
  if (word) {
    const unended = document.querySelector("#answers-unended");
    const counted = document.querySelector("#answers-count");
    const more = document.querySelector("#answers details.rest");
    const filter = () => {
      const wanted = word.value.trim().toLowerCase();
      let left = 0;
      for (const prompt of all(".prompt")) {
        const hit = (!wanted || prompt.textContent.toLowerCase().includes(wanted)) &&
          (!unended.checked || prompt.dataset.ended === "no");
        prompt.hidden = !hit;
        left += hit;
      }
      if (more && (wanted || unended.checked)) more.open = true;
      counted.textContent = wanted || unended.checked ? left + " prompts" : "";
    };
    word.addEventListener("input", filter);
    unended.addEventListener("change", filter);
  }

  // Rows of the plan by where they came from.
  for (const box of all("[data-origin]")) {
    box.addEventListener("change", () => {
      for (const row of all(".plan tr." + box.dataset.origin)) row.hidden = !box.checked;
    });
  }

  for (const copy of all("button[data-copy]")) {
    copy.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(copy.dataset.copy); copy.textContent = "copied"; }
      catch { getSelection().selectAllChildren(copy.previousElementSibling); copy.textContent = "selected"; }
    });
  }

  const links = all("nav a");
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        const link = links.find((one) => one.hash === "#" + entry.target.id);
        if (link) link.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-10% 0px -80% 0px" });
    all("main > section").forEach((section) => seen.observe(section));
  }
  addEventListener("beforeprint", () => all("details").forEach((one) => { one.open = true; }));
})();
