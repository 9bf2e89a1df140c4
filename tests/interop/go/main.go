// What each Go library does with the broker, step by step: `interop LIBRARY URL TOPIC`.
// It prints the lines that tests/interop/python/steps.py describes.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

const subprotocol = "wsbroker.v1"

// patience is the time that the steps may take together. Far more than they need, also on a busy machine.
const patience = 20 * time.Second

// fragmented is the length of the fragmented event: more than the write buffer of a library.
const fragmented = 30_000

// client is a library, as the steps need it.
type client interface {
	connect(url string) error
	send(text string) error
	receive() (string, error)
	// close closes with code 1000 and gives the code that the broker answered, or 0 where the library shows none.
	close() (int, error)
}

// fragmenter is a library that can send a message in fragments.
type fragmenter interface {
	sendFragments(parts []string) error
}

type library struct {
	module string
	client client
}

type message = map[string]any

var libraries = map[string]library{
	"gorilla": {"github.com/gorilla/websocket", &gorilla{}},
	"coder":   {"github.com/coder/websocket", &coder{}},
	"xnet":    {"golang.org/x/net", &xnet{}},
}

func main() {
	chosen, url, topic := libraries[os.Args[1]], os.Args[2], os.Args[3]
	fmt.Println("version", version(chosen.module))
	talk := &talk{client: chosen.client, topic: topic}
	time.AfterFunc(patience, func() {
		fmt.Printf("failed %s: timed out\n", talk.step)
		os.Exit(0)
	})
	if err := talk.run(url); err != nil {
		fmt.Printf("failed %s: %s\n", talk.step, strings.ReplaceAll(err.Error(), "\n", " "))
	}
}

func version(module string) string {
	info, _ := debug.ReadBuildInfo()
	for _, dependency := range info.Deps {
		if dependency.Path == module {
			return strings.TrimPrefix(dependency.Version, "v")
		}
	}
	return "unknown"
}

// talk is a connection, with the messages that came before somebody waited for them.
type talk struct {
	client client
	topic  string
	step   string
	early  []message
}

func (t *talk) run(url string) error {
	t.step = "connect"
	if err := t.client.connect(url); err != nil {
		return err
	}
	welcome, err := t.message(func(message) bool { return true })
	if err != nil {
		return err
	}
	if welcome["op"] != "welcome" || welcome["version"] != 1.0 {
		return fmt.Errorf("no welcome, but %v", welcome)
	}
	fmt.Println("ok connect")

	t.step = "subscribe"
	if err := t.client.send(fmt.Sprintf(`{"op":"subscribe","id":1,"topic":%q}`, t.topic)); err != nil {
		return err
	}
	if err := t.answer(message{"op": "ok", "id": 1.0, "topic": t.topic}); err != nil {
		return err
	}
	fmt.Println("ok subscribe")

	t.step = "publish"
	small := message{"bid": 1.0843, "name": "Zürich 🚀"}
	if err := t.client.send(t.publish(2, small)); err != nil {
		return err
	}
	receipt := message{"op": "ok", "id": 2.0, "receivers": 1.0, "queued": 0.0, "dropped": 0.0}
	if err := t.answer(receipt); err != nil {
		return err
	}
	fmt.Println("ok publish")

	t.step = "receive"
	if err := t.event(small); err != nil {
		return err
	}
	fmt.Println("ok receive")

	t.step = "large"
	large := numbers(int(welcome["max_size"].(float64)) - len(t.publish(3, "")))
	if err := t.client.send(t.publish(3, large)); err != nil {
		return err
	}
	if err := t.event(large); err != nil {
		return err
	}
	fmt.Println("ok large")

	if library, can := t.client.(fragmenter); can {
		t.step = "fragments"
		text := t.publish(4, numbers(fragmented))
		if err := library.sendFragments([]string{text[:10_000], text[10_000:20_000], text[20_000:]}); err != nil {
			return err
		}
		if err := t.event(numbers(fragmented)); err != nil {
			return err
		}
		fmt.Println("ok fragments")
	}

	t.step = "close"
	code, err := t.client.close()
	if err != nil {
		return err
	}
	if code == 0 {
		fmt.Println("ok close")
	} else {
		fmt.Println("ok close", code)
	}
	return nil
}

// message waits for the first message that fits. An error fails the step.
func (t *talk) message(fits func(message) bool) (message, error) {
	for place, found := range t.early {
		if fits(found) {
			t.early = append(t.early[:place], t.early[place+1:]...)
			return found, nil
		}
	}
	for {
		text, err := t.client.receive()
		if err != nil {
			return nil, err
		}
		var found message
		if err := json.Unmarshal([]byte(text), &found); err != nil {
			return nil, err
		}
		if fits(found) {
			return found, nil
		}
		if found["op"] == "error" {
			return nil, fmt.Errorf("an error came: %v", found)
		}
		t.early = append(t.early, found)
	}
}

func (t *talk) answer(expected message) error {
	found, err := t.message(func(found message) bool { return found["id"] == expected["id"] })
	return same(found, expected, err)
}

func (t *talk) event(data any) error {
	found, err := t.message(func(found message) bool { return found["op"] == "event" })
	return same(found, message{"op": "event", "topic": t.topic, "data": data}, err)
}

func (t *talk) publish(id int, data any) string {
	encoded, err := json.Marshal(data)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(`{"op":"publish","id":%d,"topic":%q,"data":%s}`, id, t.topic, encoded)
}

func same(found, expected message, err error) error {
	if err == nil && !reflect.DeepEqual(found, expected) {
		return fmt.Errorf("another message came: %.200s", fmt.Sprint(found))
	}
	return err
}

// numbers is a text of this length which compression makes smaller, but not small: 0 1 2 3 …
func numbers(length int) string {
	var text strings.Builder
	for number := 0; text.Len() < length; number++ {
		text.WriteString(strconv.Itoa(number) + " ")
	}
	return text.String()[:length]
}
