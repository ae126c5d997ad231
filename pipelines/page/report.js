document.documentElement.classList.remove("plain");
let current = null;
for (const player of document.querySelectorAll(".player")) {
  const audio = player.parentElement.querySelector("audio"), head = player.querySelector("i");
  const follow = () => {
    head.style.left = 100 * (audio.currentTime / audio.duration || 0) + "%";
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener("play", () => {
    if (current && current !== audio) current.pause();
    current = audio;
    player.classList.add("on");
    follow();
  });
  audio.addEventListener("pause", () => player.classList.remove("on"));
  audio.addEventListener("ended", () => { audio.currentTime = 0; });
  player.querySelector("button").addEventListener("click", () => {
    if (!audio.paused) { audio.pause(); return; }
    audio.currentTime = 0;
    audio.play();
  });
}
