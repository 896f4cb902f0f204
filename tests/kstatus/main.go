// What GitOps tools make of objects: kstatus is the library that Flux and Helm ask, a Lua check in its own interpreter is what
// Argo CD runs. Objects come as JSON, one after the other, on standard input; each answer is one line of JSON.
//
//	kstatus [-argocd health.lua] < objects.json
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

// Answer about one object.
type Answer struct {
	Kstatus        string `json:"kstatus"`
	KstatusMessage string `json:"kstatusMessage"`
	Argocd         string `json:"argocd,omitempty"`
	ArgocdMessage  string `json:"argocdMessage,omitempty"`
}

func main() {
	check := flag.String("argocd", "", "a health check of Argo CD, in Lua")
	flag.Parse()
	if err := answer(os.Stdin, os.Stdout, *check); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func answer(in io.Reader, out io.Writer, check string) error {
	var script string
	if check != "" {
		text, err := os.ReadFile(check)
		if err != nil {
			return err
		}
		script = string(text)
	}
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var text json.RawMessage
		if err := decoder.Decode(&text); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(text); err != nil {
			return err
		}
		computed, err := status.Compute(object)
		if err != nil {
			return err
		}
		answer := Answer{Kstatus: string(computed.Status), KstatusMessage: computed.Message}
		if script != "" {
			if answer.Argocd, answer.ArgocdMessage, err = health(script, object.Object); err != nil {
				return err
			}
		}
		if err := encoder.Encode(answer); err != nil {
			return err
		}
	}
}

// health runs a check as Argo CD does by default: the object is the global obj, and of Lua's libraries only the base and tables are
// there.
func health(script string, object map[string]any) (string, string, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for _, open := range []lua.LGFunction{lua.OpenBase, lua.OpenTable} {
		state.Push(state.NewFunction(open))
		state.Call(0, 0)
	}
	state.SetGlobal("obj", value(state, object))
	if err := state.DoString(script); err != nil {
		return "", "", err
	}
	told, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return "", "", fmt.Errorf("the check returned %s, expected a table", state.Get(-1).Type())
	}
	word, ok := told.RawGetString("status").(lua.LString)
	if !ok {
		return "", "", errors.New("the check returned no status")
	}
	message, _ := told.RawGetString("message").(lua.LString)
	return string(word), string(message), nil
}

func value(state *lua.LState, object any) lua.LValue {
	switch object := object.(type) {
	case map[string]any:
		table := state.NewTable()
		for key, below := range object {
			table.RawSetString(key, value(state, below))
		}
		return table
	case []any:
		table := state.NewTable()
		for _, item := range object {
			table.Append(value(state, item))
		}
		return table
	case string:
		return lua.LString(object)
	case bool:
		return lua.LBool(object)
	case int64:
		return lua.LNumber(object)
	case float64:
		return lua.LNumber(object)
	default:
		return lua.LNil
	}
}
