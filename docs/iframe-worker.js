// A page that was opened from the disk may start no worker: the script of the search then runs in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<body></body>"
      this.ready = new Promise(ready => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow, script = inside.document.createElement("script")
          inside.postMessage = data => {
            const message = new MessageEvent("message", { data })
            this.dispatchEvent(message)
            this.onmessage?.(message)
          }
          script.src = new URL(url, location.href)
          script.onload = () => ready(inside)
          inside.document.body.append(script)
        }
      })
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
